"""Gates on streams of queries with bandit feedback: benchmarks a, b, c and llm, the router, latency and the audit log."""
