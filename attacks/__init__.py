"""Attacks: one file, one attack family. Imported as `robustkit.attacks`."""

if __name__ == "attacks":
    raise ImportError("import 'robustkit.attacks', not 'attacks': that name belongs to nobody's package")
