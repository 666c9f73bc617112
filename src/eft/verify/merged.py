"""E6: merging the adapter into its base changes nothing but the last digits."""

from __future__ import annotations

from peft import PeftModel

from eft.core.records import PromiseResult
from eft.models.merge import merge_adapter
from eft.verify.excerpt import first_documents
from eft.verify.saves import PROBE_TOKENS
from eft.verify.verification import Verification


def check_merge(verification: Verification) -> list[PromiseResult]:
    """Merge the adapter that `check_export` wrote, as `eft merge` does, and compare logits on the user's own data.

    Nothing to check without an adapter, or where its base was never loaded from files.
    """
    model = verification.model
    if not isinstance(model, PeftModel) or not model.get_base_model().config.name_or_path:
        return []
    document = first_documents(verification.plan, 1, PROBE_TOKENS)[0]
    ids = [int(token) for token in document.input_ids]
    return merge_adapter(verification.folder / "export", verification.folder / "merged", ids=ids).promises
