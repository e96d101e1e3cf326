-- Let parents wait for their children; for a child that has ended already there is nothing to wait for.
-- $1 children's ids  $2 parents' ids  $3 environment ids; text[]
INSERT INTO mollifier.waitpoints (child_run_id, parent_run_id, environment_id, status)
SELECT
    coalesce(alias.run_id, wanted.child_run_id),
    wanted.parent_run_id,
    wanted.environment_id,
    CASE
        WHEN child.status IN ('COMPLETED', 'FAILED', 'CANCELED', 'EXPIRED', 'SYSTEM_FAILURE') THEN 'COMPLETED'
        ELSE 'PENDING'
    END
FROM unnest($1::text[], $2::text[], $3::text[]) AS wanted (child_run_id, parent_run_id, environment_id)
LEFT JOIN mollifier.run_aliases AS alias ON alias.id = wanted.child_run_id
LEFT JOIN mollifier.runs AS child ON child.id = coalesce(alias.run_id, wanted.child_run_id)
ON CONFLICT DO NOTHING
