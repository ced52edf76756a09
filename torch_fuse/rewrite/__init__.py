"""How a fusion is written (`Pattern`), found (`registry`) and applied to a graph (`engine`)."""
