"""Attacks: one file, one attack family. Imported as `robustkit.attacks`."""

if __name__ == "attacks":
    raise ImportError("import 'robustkit.attacks', not 'attacks': no package has that name")
