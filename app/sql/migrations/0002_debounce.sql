-- What debouncing has to remember.

ALTER TABLE mollifier.runs ADD COLUMN debounced_at timestamptz;

COMMENT ON COLUMN mollifier.runs.debounce_until IS 'how far its debounce key may push the run back; null: no limit';
COMMENT ON COLUMN mollifier.runs.debounced_at IS 'time of the trailing trigger whose payload it has; null: its own';

-- A trigger that pushed a run back becomes an alias of it, and its token counts as used.
ALTER TABLE mollifier.run_aliases ADD COLUMN one_time_use_token text;

CREATE UNIQUE INDEX run_aliases_one_time_use_token ON mollifier.run_aliases (one_time_use_token)
    WHERE one_time_use_token IS NOT NULL;
