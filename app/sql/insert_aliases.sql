-- Let accepted ids that lost their key resolve to its winner.
-- $1 ids  $2 winners' ids  $3 environment ids; text[]
INSERT INTO mollifier.run_aliases (id, run_id, environment_id)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[])
ON CONFLICT DO NOTHING
