"""The demonstration: a real 135M chat model learns to answer with function calls, on two CPU cores."""
