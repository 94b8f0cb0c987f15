"""vLLM decodes: a plugin of the stock releases, and an engine that drives them."""
