"""Views of an audit log: tables in a terminal, a page, a live view, plain files, and the computations behind them."""
