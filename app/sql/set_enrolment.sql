-- Decide whether an organization takes part.
-- $1 organization_id, text  $2 enrolled, boolean
INSERT INTO mollifier.organization_settings (organization_id, enrolled) VALUES ($1, $2)
ON CONFLICT (organization_id) DO UPDATE SET enrolled = EXCLUDED.enrolled, updated_at = now()
