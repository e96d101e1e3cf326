-- The newest runs of an environment.
-- $1 organization id  $2 environment id; text
-- $3 created_at  $4 id: only what comes after this place; null: from the beginning
-- $5 status  $6 task  $7 tag; text, null: any  $8 since  $9 until; timestamptz, null: any  $10 at most, int
-- Returns rows, the newest first.
SELECT run.*
FROM mollifier.runs AS run
WHERE run.environment_id = $2 AND run.organization_id = $1
    AND ($3::timestamptz IS NULL OR (run.created_at, run.id) < ($3::timestamptz, $4::text COLLATE "C"))
    AND ($5::text IS NULL OR run.status = $5)
    AND ($6::text IS NULL OR run.task = $6)
    AND ($7::text IS NULL OR $7 = ANY (run.tags))
    AND ($8::timestamptz IS NULL OR run.created_at >= $8)
    AND ($9::timestamptz IS NULL OR run.created_at < $9)
ORDER BY run.created_at DESC, run.id DESC
LIMIT $10
