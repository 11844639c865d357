"""Which attack is run on which images next, and when the evaluation may stop."""
