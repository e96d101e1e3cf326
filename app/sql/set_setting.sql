-- Decide something for the whole fleet.
-- $1 name, text  $2 value, jsonb
INSERT INTO mollifier.settings (name, value) VALUES ($1, $2)
ON CONFLICT (name) DO UPDATE SET value = EXCLUDED.value, updated_at = now()
