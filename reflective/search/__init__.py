"""Candidates of a question, the loop that has an engine decode them, the strategies that steer it, and what selecting is worth."""
