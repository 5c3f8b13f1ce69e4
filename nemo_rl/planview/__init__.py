"""The plan viewer: a refit planned without engines, devices or processes, as numbers, text and pictures."""
