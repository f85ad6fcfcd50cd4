"""Names methods of vLLM's LLM that loraplex does not have, and what to use."""

INSTEAD = {
    "encode": "only text is generated",
    "embed": "only text is generated",
    "classify": "only text is generated",
    "score": "only text is generated",
}
"""Maps each name to the reason and the mend."""
