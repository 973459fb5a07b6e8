"""The check of one layer by itself: its gradients, and what else is asked of `backward`."""

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
}  # files whose lines say nothing to the user


class LayerCheck(Comparison):
    """One layer, its call, and the gradient that comes into its `backward`."""

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
        """What `backward` gives and leaves, by argument and parameter; None if it raises."""
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
                f"backward() gave a {odd[0]}, and should give an array: the gradient by the input, or a tuple of one for"
                " each argument"
            )
            return None
        changed = [name for name, param in run.params().items() if not np.array_equal(param, before[name])]
        if changed:
            self.problems.append(
                f"backward() changes parameters themselves, not only their gradients: {', '.join(changed)}"
            )
        return {i: np.asarray(each) for i, each in dx.items()} | run.grads()

    # -- calls one after another --------------------------------------------------------------------------------------

    def _check_calls(self, got: dict[Key, Any]) -> None:
        """What only shows when forward and backward are called more than once. `got` are the right gradients."""
        try:
            self._check_other_batch(got)
            second, again = self._check_accumulation(got)
            self._check_zero_grad(second)
            self._check_forward(again)
        except Exception as error:
            self.problems.append(f"when called a second time, the layer raised {_told(error)}")

    def _differing(self, got: dict[Any, Any], want: dict[Any, Any]) -> list[str]:
        return [self.name(key) for key in want if not self.close(got.get(key), want[key])]

    def _unlike(self, found: dict[Key, Any], got: dict[Key, Any], later: Callable[[], Subject]) -> list[str]:
        """Which gradients are not those of before, and not right for the layer as it is later either.

        It may carry a state from one call to the next, or draw other numbers.
        """
        wrong = self._differing(found, {key: got[key] for key in found if key in got})
        if not wrong:
            return []
        subject = later()
        want = by_jax(subject, self.dout) if self.reference.by_jax else Differences(subject, self.dout).all()
        return self._differing(found, {key: want[key] for key in found if key in want and got.get(key) is not None})

    def _check_other_batch(self, got: dict[Key, Any]) -> None:
        """forward of another batch, forward of this one, backward."""
        other = self.subject.other_args()
        run = self.subject.run()
        run.clear()
        try:
            run.forward(other)
        except Exception as error:
            self.notes.append(
                f"whether it keeps something of an earlier batch is not tested: forward raised {_told(error)}"
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
            hint = ": it is that of the other one" if stale else ""
            self.problems.append(
                "after forward of another batch and then of this one, backward gives a wrong gradient by"
                f" {', '.join(wrong)}{hint}. forward() keeps something of an earlier call (a stale cache)"
            )

    def _check_accumulation(self, got: dict[Key, Any]) -> tuple[dict[Key, Any], Any]:
        """Two rounds without zero_grad between them. Gives the second's own gradients, and forward's second output."""
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
            self.problems.append(f"at its second call, backward() gives a wrong gradient by {', '.join(wrong)}")
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
                    f"backward() does not overwrite the gradient by {', '.join(wrong)}, as accumulates=False says"
                )
            return second, again
        added = {name: _added(first[name], second[name]) for name in second}
        wrong = self._differing(both, added)
        if wrong:
            kept = [name for name in wrong if self.close(both[name], second[name])]
            how = (
                "the second overwrites the first: write `dW += ...`, or, if that is intended, pass accumulates=False"
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
            self.problems.append(f"after zero_grad(), backward() gives a wrong gradient by {', '.join(wrong)}")

    def _check_forward(self, again: Any) -> None:
        """forward after backward gives what forward after forward gives."""
        run = self.subject.run()
        run.forward()
        plain = outputs_of(run.forward())
        if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(plain, outputs_of(again), strict=True)):
            self.problems.append(
                "forward() gives something else after backward(): backward() changes what forward() uses"
            )

    def _check_alignment(self) -> None:
        """Shapes and dtypes of parameters and gradients, in the dtypes that the layer has."""
        run = self.subject.run(None)
        try:
            params = [param for _, param, _ in run.entries()]
            dtype = np.result_type(*params) if params else np.dtype(np.float32)
            args = [arg.astype(dtype) if i in self.subject.floating else arg for i, arg in enumerate(self.subject.args)]
            output = outputs_of(run.forward(args))
            run.backward([each.astype(o.dtype) for each, o in zip(self.dout, output, strict=True)])
        except Exception as error:
            self.problems.append(f"in the dtypes that it has, the layer raised {_told(error)}")
            return
        for name, param, grad in run.entries():
            if name in self.subject.names and grad is not None and np.shape(grad) == param.shape:
                if np.asarray(grad).dtype != param.dtype:
                    self.problems.append(f"{name} is {param.dtype} and its gradient {np.asarray(grad).dtype}")


def _added(one: Any, other: Any) -> Any:
    return other if one is None else one if other is None else one + other


def _told(error: Exception) -> str:
    """An exception with the line of the user's code that raised it."""
    text = f"{type(error).__name__}: {str(error).strip() or 'without a message'}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name not in _OURS]
    return f"{text} (line {frames[-1].lineno} of {frames[-1].filename}, in {frames[-1].name})" if frames else text
