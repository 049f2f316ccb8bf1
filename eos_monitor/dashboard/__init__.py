"""What a run looks like: TensorBoard layout, figure, report. Works on plain rows; imports no torch."""
