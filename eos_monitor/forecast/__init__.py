"""What comes next: schedules, first steps, learning rates."""
