"""What a run is on disk: its records, its ledger, its folder. The records import no torch."""
