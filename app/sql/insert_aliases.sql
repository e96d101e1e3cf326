-- Let accepted ids that lost their key resolve to its winner; who waits for them waits for it.
-- $1 ids  $2 winners' ids  $3 environment ids; text[]
WITH alias AS (
    INSERT INTO mollifier.run_aliases (id, run_id, environment_id)
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[])
    ON CONFLICT DO NOTHING
    RETURNING id, run_id
),
moved AS (
    DELETE FROM mollifier.waitpoints AS waitpoint USING alias
    WHERE waitpoint.child_run_id = alias.id
    RETURNING alias.run_id, waitpoint.parent_run_id, waitpoint.environment_id
)
INSERT INTO mollifier.waitpoints (child_run_id, parent_run_id, environment_id, status)
SELECT
    moved.run_id,
    moved.parent_run_id,
    moved.environment_id,
    CASE
        WHEN winner.status IN ('COMPLETED', 'FAILED', 'CANCELED', 'EXPIRED', 'SYSTEM_FAILURE') THEN 'COMPLETED'
        ELSE 'PENDING'
    END
FROM moved JOIN mollifier.runs AS winner ON winner.id = moved.run_id
ON CONFLICT DO NOTHING
