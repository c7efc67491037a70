"""What held-out rows say, beyond what training measures on its way."""
