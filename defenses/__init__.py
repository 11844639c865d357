"""Defenses and training methods: one file, one method. Imported as `robustkit.defenses`."""

if __name__ == "defenses":
    raise ImportError("import 'robustkit.defenses', not 'defenses'")
