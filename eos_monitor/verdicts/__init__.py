"""What a run is doing, from readings, losses and updates."""
