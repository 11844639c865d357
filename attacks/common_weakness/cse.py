"""The cosine similarity encourager without momentum (Chen et al. 2024, arXiv:2303.09105, section 3.4).

`mi-cse` is the same with momentum. The paper first uses gradients as they are (`raw`), then of length one.
"""

from __future__ import annotations

from robustkit.registry import recipe


@recipe("cse", paper="arXiv:2303.09105")
def cse() -> str:
    """Repeats the outer step of `mi-cse` without momentum."""
    return "mi-cse(update=plain,momentum=0,inner_momentum=0)"
