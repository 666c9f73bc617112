"""The boundary audit: every causal-LM family of the installed transformers, one child process each.

    python -m tests.families.audit --write          the page docs/families.md
    python -m tests.families.audit --only llama,... rows of these families, as JSON lines

A child builds the family small, lets the product decide (`packing_support`, `boundary_probe`) and measures the truth by
itself (tests/families/oracle.py). The product must never accept what the oracle sees leak.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from multiprocessing.connection import Connection

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from eft.models.attention import PACKED_ATTENTION, install_attention, packing_support
from eft.models.probes import boundary_probe
from tests.families.oracle import LENGTHS, measure, run_alone
from tests.families.page import LONG, PAGE, ROOMY, SHORT, Verdict, render
from tests.families.shrink import small_config

TIME_LIMIT_S = 90.0
_MAX_PARAMETERS = 60_000_000
_DIFFERENCE_LIMIT = 1e-5
_GRADIENT_LIMIT = 1e-5
_LEAK_LIMIT = 1e-6
_VISIBLE = 1e-3
_REASON_CHARACTERS = 240


def audit_family(name: str) -> Verdict:
    """Verdict and truth for one family, with limits beyond the probe's documents and, where it has any, within."""
    architecture = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    try:
        model, stock = _build(name, LONG)
        run_alone(stock)
    except Exception as error:
        return Verdict(name, architecture, "not constructed", "", 0.0, 0.0, 0.0, _first_line(error), [])
    row = _judge(name, architecture, model, stock)
    if small_config(name, limit=SHORT).to_dict() == small_config(name, limit=LONG).to_dict():
        return row
    for limit in (SHORT, ROOMY):
        other = _judge(name, architecture, *_build(name, limit))
        row.faults.extend(f"with limits of {limit} tokens: {fault}" for fault in other.faults)
    if row.verdict == "refused" and other.verdict != "refused":
        return replace(row, note=f"{row.note}; rows within it: {other.verdict}, difference {other.difference:.0e}")
    return row


def _judge(name: str, architecture: str, model: PreTrainedModel, stock: PreTrainedModel) -> Verdict:
    install_attention(model, PACKED_ATTENTION)
    support = packing_support(model, longest_document=max(LENGTHS), longest_row=sum(LENGTHS))
    how = support.mask_form
    if support.mode == "native":
        how = (
            "eft attention"
            if model.config.get_text_config()._attn_implementation == PACKED_ATTENTION
            else "own attention"
        )
    if support.mode == "refused":
        return Verdict(name, architecture, "refused", "", support.leak, support.difference, 0.0, support.reason, [])
    faults = []
    probe = boundary_probe(model, support)
    if probe.status != "pass":
        faults.append(f"boundary_probe: {probe.detail}")
    try:
        truth = measure(model, stock, support)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        faults.append(f"training raises {_first_line(error)} ({place.filename.rpartition('/')[2]}:{place.lineno})")
        return Verdict(name, architecture, support.mode, how, support.leak, support.difference, 0.0, "", faults)
    # Written so that NaN is a fault.
    if not truth.leak <= _LEAK_LIMIT:
        faults.append(f"leak {truth.leak:.1e}")
    if not truth.difference <= _DIFFERENCE_LIMIT:
        faults.append(f"difference {truth.difference:.1e}")
    if not truth.gradient <= _GRADIENT_LIMIT:
        faults.append(f"gradient {truth.gradient:.1e}")
    if not truth.visible >= _VISIBLE:
        faults.append(f"blind: a row without boundaries differs by {truth.visible:.1e} only")
    note = support.reason if support.mode == "mask" else ""
    return Verdict(name, architecture, support.mode, how, truth.leak, truth.difference, truth.gradient, note, faults)


def _build(name: str, limit: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two small models with equal weights, in training mode."""
    config = small_config(name, limit=limit)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MAX_PARAMETERS:
        raise ValueError(f"its small config still has {size:,} parameters")
    built = []
    for _ in range(2):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small_config(name, limit=limit), dtype=torch.float32).train()
        _stir(model)
        built.append(model)
    return built[0], built[1]


def _stir(model: PreTrainedModel) -> None:
    """Noise on every parameter: a branch that starts at zero could hide a leak."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_REASON_CHARACTERS]


def audit(names: list[str]) -> Iterator[Verdict]:
    """Verdicts in the order of `names`, each from a child that cannot hang or kill the rest."""
    context = multiprocessing.get_context("fork")
    for name in names:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(name, sender))
        started = time.perf_counter()
        child.start()
        sender.close()
        verdict = None
        try:
            if receiver.poll(TIME_LIMIT_S):
                verdict = Verdict(**receiver.recv())
        except EOFError:
            pass
        child.kill()
        child.join()
        if verdict is None:
            reason = f"no answer within {TIME_LIMIT_S:.0f} s, or its process died"
            architecture = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
            verdict = Verdict(name, architecture, "not constructed", "", 0.0, 0.0, 0.0, reason, [reason])
        yield Verdict(**{**asdict(verdict), "seconds": round(time.perf_counter() - started, 1)})


def _child(name: str, sender: Connection) -> None:
    # Third-party models warn about much that is not ours to judge.
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        sender.send(asdict(audit_family(name)))
    except Exception as error:
        traceback.print_exc()
        row = Verdict(name, "", "not constructed", "", 0.0, 0.0, 0.0, "", [f"the audit failed: {_first_line(error)}"])
        sender.send(asdict(row))


def main() -> None:
    parser = argparse.ArgumentParser(description="the boundary audit of every causal-LM family")
    parser.add_argument("--only", help="families, with commas between: rows as JSON lines")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(PAGE.parents[1])}")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    verdicts = []
    for verdict in audit(names):
        verdicts.append(verdict)
        print(json.dumps(asdict(verdict)), flush=True)
    if options.write and not options.only:
        PAGE.write_text(render(verdicts), encoding="utf-8")
    if faulty := [verdict.family for verdict in verdicts if verdict.faults]:
        sys.exit(f"the oracle contradicts the product for {', '.join(faulty)}")


if __name__ == "__main__":
    main()
