-- Decide on an organization's weight in the drain.
-- $1 organization_id, text  $2 weight, integer
INSERT INTO mollifier.organization_settings (organization_id, weight) VALUES ($1, $2)
ON CONFLICT (organization_id) DO UPDATE SET weight = EXCLUDED.weight, updated_at = now()
