"""Views of a report. They read the record and nothing else, and import no torch."""
