"""Names methods of vLLM's LLM that loraplex does not have, and what to use."""

INSTEAD = {
    "reset_prefix_cache": "the cache cannot be emptied; a new cache_salt in the prompts shares "
    "nothing with the old ones",
    "get_metrics": "use llm.client.stats()",
    "sleep": "weights cannot leave the device; use shutdown() and make a new LLM",
    "wake_up": "an LLM never sleeps; use shutdown() and make a new LLM",
    "encode": "only text is generated",
    "embed": "only text is generated",
    "classify": "only text is generated",
    "score": "only text is generated",
}
"""Maps each name to the reason and the mend."""
