"""See `axolotl`."""
