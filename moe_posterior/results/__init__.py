"""What every result is shown with: tables, intervals, figures and web pages, each written once.

A leaf: it knows nothing of gates, benchmarks or reports, which compute their numbers and hand them over.
"""
