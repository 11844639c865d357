"""Terminal tables, HTML pages, charts and exports. They read records only and do not import torch."""
