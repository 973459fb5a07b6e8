"""The check of one layer by itself: its gradients, and the other requirements on `backward`."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .comparison import Comparison
from .reference import Differences, by_jax, reference_for
from .report import GradientComparison, LayerReport, kind_of
from .subject import Key, Run, Subject, outputs_of

_OURS = {
    "layer_check.py",
    "comparison.py",
    "subject.py",
    "reference.py",
    "world.py",
    "recording.py",
}  # files of the check itself: tracebacks skip their lines


class LayerCheck(Comparison):
    """The check of one layer, with its call and the incoming gradient of its `backward`."""

    def report(self) -> LayerReport:
        """Run all checks."""
        subject = self.subject
        run = subject.run()
        run.clear()
        self.outputs = outputs_of(run.forward())
        got = self._backward(run)
        if got is None:
            return self._made("wrong", (), "")
        self.reference = reference_for(subject, self.dout, self.outputs)
        self.rtol = self.tolerance(got)
        gradients = self.compared(got)
        if all(each.ok for each in gradients):
            self._check_calls(got)
        self._check_alignment()
        wrong = self.problems or not all(each.ok for each in gradients)
        return self._made("wrong" if wrong else "right", gradients, self.reference.how)

    def _made(
        self, state: Literal["right", "wrong"], gradients: Sequence[GradientComparison], reference: str
    ) -> LayerReport:
        kind = kind_of(self.subject.layer)
        return LayerReport(
            self.subject.path, kind, state, tuple(gradients), tuple(self.problems), tuple(self.notes), reference
        )

    # -- gradients ----------------------------------------------------------------------------------------------------

    def _backward(self, run: Run) -> dict[Key, Any] | None:
        """The gradients from `backward`, by argument and parameter; None if it raises."""
        try:
            before = {name: np.array(param) for name, param in run.params().items()}
            dout = [np.array(each) for each in self.dout]
            dx = run.backward(dout)
        except Exception as error:
            self.problems.append(f"backward() raised {_told(error)}")
            return None
        odd = [kind_of(each) for each in dx.values() if np.asarray(each).dtype.hasobject]
        if odd:
            self.problems.append(
                f"backward() returned a {odd[0]}: it must return an array, the gradient by the input, or a tuple with one"
                " array for each argument"
            )
            return None
        changed = [name for name, param in run.params().items() if not np.array_equal(param, before[name])]
        if changed:
            self.problems.append(f"backward() changes parameters, not only their gradients: {', '.join(changed)}")
        return {i: np.asarray(each) for i, each in dx.items()} | run.grads()

    # -- repeated calls -----------------------------------------------------------------------------------------------

    def _check_calls(self, got: dict[Key, Any]) -> None:
        """Find mistakes that show only in repeated calls of forward and backward. `got` are the right gradients."""
        try:
            self._check_other_batch(got)
            second, again = self._check_accumulation(got)
            self._check_zero_grad(second)
            self._check_forward(again)
        except Exception as error:
            self.problems.append(f"when it was called a second time, the layer raised {_told(error)}")

    def _differing(self, got: dict[Any, Any], want: dict[Any, Any]) -> list[str]:
        return [self.name(key) for key in want if not self.close(got.get(key), want[key])]

    def _unlike(self, found: dict[Key, Any], got: dict[Key, Any], later: Callable[[], Subject]) -> list[str]:
        """The names of gradients that differ from the earlier ones, and are wrong for the later layer too.

        The layer may keep a state between calls, or draw other random numbers.
        """
        wrong = self._differing(found, {key: got[key] for key in found if key in got})
        if not wrong:
            return []
        subject = later()
        want = by_jax(subject, self.dout) if self.reference.by_jax else Differences(subject, self.dout).all()
        return self._differing(found, {key: want[key] for key in found if key in want and got.get(key) is not None})

    def _check_other_batch(self, got: dict[Key, Any]) -> None:
        """Run forward on another batch, forward on this one, then backward."""
        other = self.subject.other_args()
        run = self.subject.run()
        run.clear()
        try:
            run.forward(other)
        except Exception as error:
            self.notes.append(
                f"the check for values kept from an earlier batch was skipped: forward raised {_told(error)}"
            )
            return
        run.forward()
        found = run.backward(self.dout) | run.grads()
        wrong = self._unlike(found, got, lambda: self.subject.after(other))
        if wrong:
            like = self.context().others
            stale = [
                name for name in wrong if any(self.name(k) == name and self.close(found.get(k), like[k]) for k in like)
            ]
            hint = ", which is that of the other batch" if stale else ""
            self.problems.append(
                "after forward on another batch and then on this one, backward returns a wrong gradient by"
                f" {', '.join(wrong)}{hint}. forward() keeps something of an earlier call (a stale cache)"
            )

    def _check_accumulation(self, got: dict[Key, Any]) -> tuple[dict[Key, Any], Any]:
        """Run two rounds without zero_grad between them. Returns the second round's own gradients and output."""
        apart = self.subject.run()
        apart.clear()
        apart.forward()
        apart.backward(self.dout)
        first = apart.grads()
        apart.clear()
        again = apart.forward()
        apart.backward(self.dout)
        second = apart.grads()
        wrong = self._unlike(second, got, lambda: self.subject.after(self.subject.args, self.dout))
        if wrong:
            self.problems.append(f"at its second call, backward() returns a wrong gradient by {', '.join(wrong)}")
            return second, again
        together = self.subject.run()
        together.clear()
        for _ in range(2):
            together.forward()
            together.backward(self.dout)
        both = together.grads()
        if not self.subject.settings.accumulates:
            wrong = self._differing(both, second)
            if wrong:
                self.problems.append(
                    f"with accumulates=False, backward() must overwrite gradients; it does not for {', '.join(wrong)}"
                )
            return second, again
        added = {name: _added(first[name], second[name]) for name in second}
        wrong = self._differing(both, added)
        if wrong:
            kept = [name for name in wrong if self.close(both[name], second[name])]
            how = (
                "the second overwrites the first. Write `dW += ...`; or pass accumulates=False, if this is intended"
                if kept == wrong
                else "they should add up"
            )
            self.problems.append(f"two calls of backward() do not add up in the gradient by {', '.join(wrong)}: {how}")
        return second, again

    def _check_zero_grad(self, second: dict[Key, Any]) -> None:
        run = self.subject.run()
        if not second or not callable(getattr(run.layer, "zero_grad", None)):
            return
        run.clear()
        run.forward()
        run.backward(self.dout)
        run.layer.zero_grad()
        left = [str(name) for name, grad in run.grads().items() if grad is not None and np.any(grad)]
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
        for name, param, grad in run.entries():
            if name in self.subject.names and grad is not None and np.shape(grad) == param.shape:
                if np.asarray(grad).dtype != param.dtype:
                    self.problems.append(f"{name} is {param.dtype}, and its gradient is {np.asarray(grad).dtype}")


def _added(one: Any, other: Any) -> Any:
    return other if one is None else one if other is None else one + other


def _told(error: Exception) -> str:
    """The text of an exception, with the line of the user's code that raised it."""
    text = f"{type(error).__name__}: {str(error).strip() or 'without a message'}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name not in _OURS]
    return f"{text} (line {frames[-1].lineno} of {frames[-1].filename}, in {frames[-1].name})" if frames else text
