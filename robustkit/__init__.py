"""Measure how robust a PyTorch image classifier really is.

    from robustkit import evaluate, load_model, ThreatModel
    report = evaluate(model, images, labels, ThreatModel.parse("linf:8/255"))
    report.robust_accuracy, report.flags

The names are imported on first use, so that the command line answers without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustkit.api.attack import attack
    from robustkit.api.corrupt import corrupt
    from robustkit.api.craft import craft
    from robustkit.api.diversity import diversity
    from robustkit.api.evaluate import evaluate
    from robustkit.api.minimum_norm import minimum_norm
    from robustkit.api.plan import plan
    from robustkit.api.train import train
    from robustkit.api.verify import verify
    from robustkit.core.errors import RobustkitError, RunError, UsageError
    from robustkit.core.flags import Flag
    from robustkit.core.threat import ThreatModel
    from robustkit.data import load_data
    from robustkit.engine.evaluation.minimum_norm import MinimumNorm
    from robustkit.models import as_classifier, load_model
    from robustkit.runs.evaluation_record import Report
    from robustkit.version import __version__

__all__ = [
    "Flag",
    "MinimumNorm",
    "Report",
    "RobustkitError",
    "RunError",
    "ThreatModel",
    "UsageError",
    "__version__",
    "as_classifier",
    "attack",
    "corrupt",
    "craft",
    "diversity",
    "evaluate",
    "load_data",
    "load_model",
    "minimum_norm",
    "plan",
    "train",
    "verify",
]

_HOME = {
    "__version__": "version",
    "Flag": "core.flags",
    "MinimumNorm": "engine.evaluation.minimum_norm",
    "Report": "runs.evaluation_record",
    "RobustkitError": "core.errors",
    "RunError": "core.errors",
    "ThreatModel": "core.threat",
    "UsageError": "core.errors",
    "as_classifier": "models",
    "attack": "api.attack",
    "corrupt": "api.corrupt",
    "craft": "api.craft",
    "diversity": "api.diversity",
    "evaluate": "api.evaluate",
    "load_data": "data",
    "load_model": "models",
    "minimum_norm": "api.minimum_norm",
    "plan": "api.plan",
    "train": "api.train",
    "verify": "api.verify",
}

# In a checkout `attacks` and `defenses` here are links to the folders beside this one. Where git writes links as
# text files, as on Windows, the packages are found through the path of this package.
if not (Path(__file__).parent / "attacks" / "__init__.py").exists():
    __path__.append(str(Path(__file__).parents[1]))


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'robustkit' has no attribute {name!r}")
    return getattr(import_module(f"robustkit.{_HOME[name]}"), name)
