"""One evaluation, from its spec to its report."""
