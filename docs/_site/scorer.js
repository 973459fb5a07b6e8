// Sphinx's weights, but names of adapters come after those of the package: `backward` is first of all `mt.backward`.
var Scorer = {
  score: ([docname, title, anchor, description, score]) =>
    docname.startsWith("reference/adapters/") ? score - 12 : score,
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
