"""The trainer: seven mixins over `transformers.Trainer`, each the adapter of one component."""
