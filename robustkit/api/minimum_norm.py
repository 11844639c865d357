"""`robustkit.minimum_norm`: the smallest perturbation of each image that fools a model."""

from __future__ import annotations

from robustkit.api.inputs import load_or_wrap, place_of, read_samples
from robustkit.api.options.evaluate import MinimumNormArguments
from robustkit.api.verbs import verb
from robustkit.core.errors import UsageError
from robustkit.core.threat import EXAMPLE_EPS, ThreatModel
from robustkit.engine.evaluation.minimum_norm import MinimumNorm, nearest_points
from robustkit.models.label_matching import matched_to


@verb(MinimumNormArguments)
def minimum_norm(arguments: MinimumNormArguments) -> MinimumNorm:
    """Return the nearest adversarial image found for each image, and its distance.

    Returns:
        `x` (B C H W), the nearest adversarial images; `distance` (B), in pixel units of [0, 1], infinite where
        none was found; `found` (B).

    Raises:
        UsageError: the request cannot be carried out.
        RunError: the run failed.

    Example:
        >>> import robustkit
        >>> data = robustkit.load_data("digits:test").head(4)
        >>> nearest = robustkit.minimum_norm("robustkit:digits-cnn", data, norm="l2", attack="ddn(steps=20)")
        >>> tuple(nearest.x.shape), nearest.distance.shape[0]
        ((4, 1, 8, 8), 4)
    """
    if arguments.norm.strip().lower() not in EXAMPLE_EPS:
        raise UsageError(f"norm must be linf, l2 or l1, got {arguments.norm!r}.")
    model = load_or_wrap(arguments.model, arguments.trust_code)
    device = place_of(model, arguments.device)
    return nearest_points(
        model.to(device),
        matched_to(read_samples(arguments.x, arguments.y), model),
        ThreatModel.parse(f"{arguments.norm}:min"),
        suite=arguments.attack,
        seed=arguments.seed,
        device=device,
        batch_size=arguments.batch_size,
    )
