"""Write an attack as a class with two functions: `init` returns the first points, `step` the next ones."""

from dataclasses import dataclass

from robustkit import evaluate, load_data, load_model
from robustkit.attack_api import RowWise
from robustkit.registry import attack


@attack("bim", paper="arXiv:1607.02533", norms=("linf", "l2"), access="gradient")
@dataclass(frozen=True, slots=True)
class BIM(RowWise):
    """The basic iterative method: steps along the gradient from the clean image, without a random start."""

    steps: int = 10
    step_size: float = 0.2
    loss: str = "margin"

    def init(self, rows):
        """Return the state of each row before the first step."""
        return {"x": rows.x}

    def step(self, rows, state, answer):
        """Return the state after one step; `answer` has the loss and its gradient at `state["x"]`."""
        size = self.step_size * float(rows.threat.eps)
        return {"x": rows.threat.project(state["x"] + size * rows.threat.ascent(answer.gradient), rows.x)}


data = load_data("digits:test").head(16)
model = load_model("robustkit:digits-cnn")
report = evaluate(model, data.images(range(16)), data.labels, "linf:0.1", suite=[BIM(), "square(queries=50)"])
for stage in report.stages:
    print(f"after {stage.attack}: robust accuracy {stage.robust_accuracy.value:.1%}")
