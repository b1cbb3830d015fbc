"""Trials to Ray Tune (`tune`), what they will cost (`budget`), what a person sees meanwhile (`progress`)."""
