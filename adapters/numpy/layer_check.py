"""The check of one layer by itself: its gradients, and the other requirements on `backward`."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minitorch_jax.state.walk import join

from .calling import NotUnderstoodError
from .comparison import Comparison
from .differences import MovedError, Slopes
from .names import examples, is_statistic
from .objects import all_in, is_object
from .report import GradientComparison, LayerReport, State, kind_of
from .subject import Key, Run, Subject, outputs_of, shared

_RESETS = re.compile("flush|reset|clear|zero|empty")
_OURS = Path(__file__).parent  # tracebacks skip the lines of the check itself


@dataclass
class Inside:
    """What is known of the layers inside a layer, which are checked before it."""

    covered: list[Any] = field(default_factory=list)  # the arrays that their reports name
    widening: dict[str, str] = field(
        default_factory=dict
    )  # the layers that return a wider type than they get, and a note


class LayerCheck(Comparison):
    """The check of one layer, with its call and the incoming gradient of its `backward`."""

    how: bool | None = None  # True if backward adds to gradients, False if it assigns them

    def __init__(self, subject: Subject, dout: Sequence[Any], inside: Inside) -> None:
        super().__init__(subject, dout)
        self.inside = inside

    def report(self) -> LayerReport:
        """Run all checks."""
        run = self.subject.run()
        run.fill()
        self.outputs = outputs_of(run.forward())
        got = self._backward(run)
        if got is None:
            return self._made("not judged" if self.unsure else "wrong", ())
        try:
            self.prepare(got)
            gradients = [*self.compared(got), *self.unchecked()]
        except MovedError as error:
            self.unsure.append(str(error))
            gradients = []
        if all(each.ok for each in gradients) and not self.unsure:
            self._check_calls(got)
        self._check_alignment()
        state: State = "not judged" if self.unsure else "right"
        wrong = [each.name for each in gradients if not each.ok]
        if self.subject.doubts and set(wrong) & set(self.subject.names):
            self.unsure, state = self.subject.doubts, "not judged"
        elif self.problems or wrong:
            state = "wrong"
        elif state == "right" and not all(each.checked for each in gradients):
            state = "not checked"
        return self._made(state, gradients)

    def _made(self, state: State, gradients: Sequence[GradientComparison]) -> LayerReport:
        kind, problems = kind_of(self.subject.layer), (*self.problems, *self.unsure)
        notes = tuple(dict.fromkeys(self.notes))
        return LayerReport(self.subject.path, kind, state, tuple(gradients), problems, notes, self.how)

    def unchecked(self) -> list[GradientComparison]:
        """The arrays without a gradient on which the output depends."""
        found = []
        names = [n for n in self.subject.kept if not shared(self.subject.arrays[n], self.inside.covered)]
        found_names = [n for n in names if self.subject.matters(n)] if names and self.subject.matters(*names) else []
        statistics = [f"*{n.rpartition('.')[2]}" for n in found_names if is_statistic(n.rpartition(".")[2])]
        for name in found_names:
            if name in self.subject.replaced:
                hint = (
                    f"not checked: forward() replaces {join(self.subject.path, name)} by other values at each call. Check it"
                    " with values that forward() leaves as they are, or leave that change to the training loop"
                )
            elif f"*{name.rpartition('.')[2]}" in statistics:
                hint = (
                    f"not checked: the output depends on {join(self.subject.path, name)}, which is a statistic by its name."
                    f" If it is not trained: frozen={statistics if len(statistics) > 1 else statistics[0]!r}"
                )
            else:
                looked = examples(name.rpartition(".")[2])
                like = list(dict.fromkeys(self.subject.proposals.get(name, [])))
                pair = like[0] if like else (name, "...")
                like_it = f" (backward sets {' and '.join(g for _, g in like)} of its shape)" if like else ""
                hint = (
                    f"not checked: the output depends on {join(self.subject.path, name)}, and no gradient was found beside it"
                    f" ({looked}, ...). Pass the name of its gradient, gradients={{{pair[0]!r}: {pair[1]!r}}}"
                    f"{like_it}; or name the array in `frozen`, if it is not trained"
                )
            shape = np.shape(self.subject.arrays[name])
            found.append(GradientComparison(name, shape, None, True, hint=hint, remark="not checked", checked=False))
        return found

    # -- gradients ----------------------------------------------------------------------------------------------------

    def _backward(self, run: Run) -> dict[Key, Any] | None:
        """The gradients from `backward`, by argument and parameter; None if it raises or cannot be judged."""
        before = {name: np.array(param) for name, param in run.params().items()}
        kept = [name for name in self.subject.kept if name not in self.subject.replaced]
        before |= {name: np.array(run.world.of(self.subject.arrays[name])) for name in kept}
        try:
            dx = run.backward([np.array(each) for each in self.dout])
        except NotUnderstoodError as error:
            self.unsure.append(str(error))
            return None
        except Exception as error:
            self.problems.append(f"backward() raised {_told(error)}")
            return None
        now = self.subject.found(run.layer)
        moved = [n for n, old in before.items() if n in now and not np.array_equal(now[n], old, equal_nan=True)]
        changed = [n for n in moved if n in self.subject.names or self.subject.matters(n)]
        if changed:
            rate = "takes a learning rate, and " * self.subject.calling.updates
            known = [name for name in changed if name in self.subject.names] and not rate
            gradient = f"d{changed[0].rpartition('.')[2]}"
            (self.problems if known else self.unsure).append(  # a layer that keeps no gradients is of another design
                f"backward() {rate}changes parameters, not only their gradients: {', '.join(changed)}. Take the update out,"
                f" keep the gradient beside the parameter ({gradient}), and leave the update to an optimizer"
            )
            return None
        odd = [kind_of(each) for each in dx.values() if np.asarray(each).dtype.hasobject]
        if odd:
            self.problems.append(
                f"backward() returned a {odd[0]}: it must return an array, the gradient by the input, or a tuple with one"
                " array for each argument"
            )
            return None
        return {i: np.asarray(each) for i, each in dx.items()} | run.grads()

    # -- repeated calls -----------------------------------------------------------------------------------------------

    def _check_calls(self, got: dict[Key, Any]) -> None:
        """Find mistakes that show only in repeated calls of forward and backward. `got` are the right gradients."""
        try:
            if not self._check_other_batch(got):
                return
            second, again = self._check_accumulation(got)
            self._check_zero_grad(second)
            self._check_forward(again)
        except Exception as error:
            self.problems.append(f"when it was called a second time, the layer raised {_told(error)}")

    def _differing(self, got: Mapping[Any, Any], want: Mapping[Any, Any]) -> list[str]:
        return [self.name(key) for key in want if not self.close(got.get(key), want[key])]

    def _unlike(self, found: dict[Key, Any], got: dict[Key, Any], later: tuple[Any, ...]) -> list[str]:
        """The names of gradients that differ from the earlier ones, and are wrong for the layer after `later` too.

        The layer may keep a state between calls, or draw other random numbers.
        """
        if not self._differing(found, {key: got[key] for key in found if key in got}):
            return []
        slopes = Slopes(self.subject.after(*later), self.dout)
        keys = [key for key in found if key in slopes.values and got.get(key) is not None]
        return [self.name(key) for key in keys if not self.evidence(key, slopes).fits(found[key], 10)]

    def _reset_that_helps(self, other: tuple[Any, ...], got: dict[Key, Any]) -> str:
        """The method that empties what forward keeps, of the layer and those inside, if backward is right after it."""
        parts = list(filter(is_object, all_in(self.subject.layer)))
        names = dict.fromkeys(name for part in parts for name in dir(part) if _RESETS.match(name))
        for name in names:
            run = self.subject.run()
            run.forward(other)
            try:
                for part in filter(is_object, all_in(run.layer)):
                    getattr(part, name, lambda: None)()
                run.fill()
                run.forward()
                found = run.backward(self.dout) | run.grads()
            except Exception:  # it may not be a method, or need arguments
                continue
            if not self._differing(found, got):
                return name
        return ""

    def _check_other_batch(self, got: dict[Key, Any]) -> bool:
        """Run forward on another batch, forward on this one, then backward. False if no other calls can be checked."""
        other = self.subject.other_args()
        run = self.subject.run()
        run.fill()
        try:
            run.forward(other)
        except Exception as error:
            self.notes.append(
                f"the check for values kept from an earlier batch was skipped: forward raised {_told(error)}"
            )
            return True
        run.forward()
        found = run.backward(self.dout) | run.grads()
        wrong = self._unlike(found, got, (other,))
        if wrong and (reset := self._reset_that_helps(other, got)):
            self.notes.append(
                f"forward() keeps the values of all its calls until {reset}(): call that before each forward. Repeated calls"
                " without it were not checked"
            )
            return False
        if wrong:
            run = self.subject.run()
            run.fill()
            run.forward(other)
            like = run.backward(self.dout) | run.grads()
            stale = [key for key in like if self.name(key) in wrong and self.close(found.get(key), like[key])]
            hint = ", which is that of the other batch" if stale else ""
            self.problems.append(
                "after forward on another batch and then on this one, backward returns a wrong gradient by"
                f" {', '.join(wrong)}{hint}. forward() keeps something of an earlier call (a stale cache)"
            )
        return True

    def _check_accumulation(self, got: dict[Key, Any]) -> tuple[dict[Key, Any], Any]:
        """Run backward a second time, with gradients of zero and with other gradients. Returns its results for zero."""
        apart = self.subject.run()
        apart.fill()
        apart.forward()
        apart.backward(self.dout)
        apart.fill()
        again = apart.forward()
        apart.backward(self.dout)
        second = apart.grads()
        wrong = self._unlike(second, got, (self.subject.args, self.dout))
        if wrong:
            self.problems.append(f"at its second call, backward() returns a wrong gradient by {', '.join(wrong)}")
            return second, again
        together = self.subject.run()
        together.fill()
        together.forward()
        together.backward(self.dout)
        start = {  # of the size of the gradients, so that rounding hides neither
            name: self.rng.normal(size=np.shape(grad)) * (float(np.abs(grad).max(initial=0.0)) or 1.0)
            for name, grad in second.items()
            if grad is not None
        }
        filled = set(together.fill(start)) & start.keys() - set(self.subject.returned)
        together.forward()
        together.backward(self.dout)
        both = {name: grad for name, grad in together.grads().items() if name in filled}
        adds = [n for n, grad in both.items() if self.close(grad, start[n] + second[n])]
        assigns = [n for n, grad in both.items() if n not in adds and self.close(grad, second[n])]
        self._judge_accumulation([str(name) for name in both], list(map(str, adds)), list(map(str, assigns)))
        return second, again

    def _judge_accumulation(self, names: list[str], adds: list[str], assigns: list[str]) -> None:
        wanted, said = self.subject.settings.accumulates, "two calls of backward() do not add up in the gradient by"
        neither = [name for name in names if name not in (*adds, *assigns)]
        mixed = [
            f"{', '.join(mine)}, and assigns that by {', '.join(theirs)}"
            for owner in dict.fromkeys(name.rpartition(".")[0] for name in names)
            if (mine := [name for name in adds if name.rpartition(".")[0] == owner])
            and (theirs := [name for name in assigns if name.rpartition(".")[0] == owner])
        ]
        if neither:
            self.problems.append(
                f"{said} {', '.join(neither)}: they should add up, or the second should overwrite the first"
            )
        elif wanted and assigns:
            self.problems.append(f"{said} {', '.join(assigns)}: the second overwrites the first. Write `dW += ...`")
        elif wanted is False and adds:
            self.problems.append(
                f"with accumulates=False, backward() must overwrite gradients; it does not for {', '.join(adds)}"
            )
        elif mixed:
            self.problems.append(f"backward() adds to the gradient by {'; '.join(mixed)}: do the same for both")
        elif bool(adds) != bool(assigns):
            self.how = bool(adds)

    def _check_zero_grad(self, second: dict[Key, Any]) -> None:
        run = self.subject.run()
        if not second or not callable(getattr(run.layer, "zero_grad", None)):
            return
        run.fill()
        run.forward()
        run.backward(self.dout)
        run.layer.zero_grad()
        left = [str(name) for name, grad in run.grads().items() if grad is not None and np.any(grad)]
        left = [name for name in left if name not in self.subject.returned]
        if left:
            self.problems.append(f"zero_grad() does not reset the gradient by {', '.join(left)}")
            return
        run.forward()
        run.backward(self.dout)
        wrong = self._differing(run.grads(), second)
        if wrong:
            self.problems.append(f"after zero_grad(), backward() returns a wrong gradient by {', '.join(wrong)}")

    def _check_forward(self, again: Any) -> None:
        """Check that forward after backward returns the same as forward after forward."""
        run = self.subject.run()
        run.forward()
        plain = outputs_of(run.forward())
        if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(plain, outputs_of(again), strict=True)):
            self.problems.append(
                "forward() returns another output after backward(): backward() changes something that forward() uses"
            )

    def _check_alignment(self) -> None:
        """Check the dtypes of parameters and gradients, in a run with the layer's own dtypes."""
        run = self.subject.run(None)
        try:
            params = [param for _, param, _ in run.entries()]
            dtype = np.result_type(*params) if params else np.dtype(np.float32)
            args = [arg.astype(dtype) if i in self.subject.floating else arg for i, arg in enumerate(self.subject.args)]
            output = outputs_of(run.forward(args))
            run.backward([each.astype(o.dtype) for each, o in zip(self.dout, output, strict=True)])
        except Exception as error:
            self.problems.append(f"in a run with its own dtypes, the layer raised {_told(error)}")
            return
        wide = {each.dtype.name for each in output if each.dtype.kind == "f" and each.dtype.itemsize > dtype.itemsize}
        path = self.subject.path
        parts = [each for each in self.inside.widening if not path or each.startswith(f"{path}.")]
        found = [
            f"{name} is {param.dtype}, and its gradient is {np.asarray(grad).dtype}"
            for name, param, grads in run.entries()
            for grad in grads
            if name in self.subject.names and np.shape(grad) == param.shape
            if np.asarray(grad).dtype != param.dtype
        ]
        if not wide:
            self.problems += found
        elif found and parts:
            for each in parts:
                self.inside.widening[each] = (
                    f"forward() returns {wide.copy().pop()} for {dtype} arguments, so that {found[0]}: convert what it"
                    " multiplies by, as in mask.astype(x.dtype)"
                )
        elif found:
            self.notes.append(f"forward() returns {wide.pop()} for {dtype} arguments, so that {found[0]}")
        elif not parts:
            self.inside.widening[path] = ""


def _told(error: Exception) -> str:
    """The text of an exception, with the line of the user's code that raised it."""
    text = f"{type(error).__name__}: {str(error).strip() or 'without a message'}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent != _OURS]
    return f"{text} (line {frames[-1].lineno} of {frames[-1].filename}, in {frames[-1].name})" if frames else text
