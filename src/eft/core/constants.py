"""Values that several rooms must agree on."""

from __future__ import annotations

IGNORE_INDEX = -100
"""Label of a position that is context, never a target (torch's `ignore_index` default)."""

EXIT_OK = 0
EXIT_FAILED = 1
"""A run or a verification failed."""
EXIT_USAGE = 2
"""The config, the data or the command line is wrong; nothing was trained."""
EXIT_SIGINT = 130
"""Ctrl-C: the step was finished and a full checkpoint written (128 + SIGINT)."""
EXIT_SIGTERM = 143
"""SIGTERM: the step was finished and a full checkpoint written (128 + SIGTERM; SIGUSR1 alike: 138)."""
EXIT_STOP_FILE = 75
"""The same, asked for by the stop file (EX_TEMPFAIL of sysexits.h: try again later)."""

CHECKPOINT_PREFIX = "checkpoint-"
MANIFEST_NAME = "manifest.json"
"""Written last into a checkpoint or export: its presence and its checksums make it COMPLETE."""

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
LEDGER_FILE = "ledger.json"
PLAN_FILE = "plan.json"
MEMORY_FILE = "memory.json"
SAVES_FILE = "saves.jsonl"
SAMPLES_FILE = "samples.jsonl"
SUMMARY_FILE = "summary.json"
PROMISES_FILE = "promises.json"
REPORT_FILE = "report.html"
