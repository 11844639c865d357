"""Nesterov's look ahead with variance tuning (Wang and He 2021, arXiv:2103.15571).

Neighbours are drawn around the query point; common code draws them around the current point.
"""

from __future__ import annotations

from robustkit.registry import recipe


@recipe("vni-fgsm", paper="arXiv:2103.15571")
def vni_fgsm() -> str:
    """Nesterov's look ahead with variance tuning."""
    return "ni-fgsm+vmi"
