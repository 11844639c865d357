"""The cosine similarity encourager without momentum (Chen et al. 2024, arXiv:2303.09105, section 3.4).

`mi-cse` is the same with momentum. The paper first has the gradients as they are (`raw`), then of length one.
"""

from __future__ import annotations

from robustkit.registry import recipe


@recipe("cse", paper="arXiv:2303.09105")
def cse() -> str:
    """To where one small step along each member's gradient in turn leads, again and again."""
    return "mi-cse(update=plain,momentum=0,inner_momentum=0)"
