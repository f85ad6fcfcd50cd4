"""Names methods of vLLM's LLM that loraplex does not have, and what to use."""

INSTEAD = {
    "sleep": "weights cannot leave the device; use shutdown() and make a new LLM",
    "wake_up": "an LLM never sleeps; use shutdown() and make a new LLM",
    "encode": "only text is generated",
    "embed": "only text is generated",
    "classify": "only text is generated",
    "score": "only text is generated",
}
"""Maps each name to the reason and the mend."""
