-- The revision of what operators have decided: it grows with each change.
SELECT coalesce(max(id), 0) FROM mollifier.audit
