-- Decide on the gate of an environment or organization; what is null stays as it was.
-- $1 scope, text  $2 id, text  $3 window_ms, integer  $4 threshold, integer  $5 hold_ms, integer
INSERT INTO mollifier.gate_settings AS known (scope, id, window_ms, threshold, hold_ms) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (scope, id) DO UPDATE SET
    window_ms = coalesce(EXCLUDED.window_ms, known.window_ms),
    threshold = coalesce(EXCLUDED.threshold, known.threshold),
    hold_ms = coalesce(EXCLUDED.hold_ms, known.hold_ms),
    updated_at = now()
