-- Keep what was changed on a buffered run that became an alias: its tags and metadata are added to its winner's.
-- $1 the alias, text  $2 the winner's id, text  $3 tags, text[]  $4 metadata, jsonb
-- Once only: the alias is remembered among the operations that changed the winner.
UPDATE mollifier.runs AS run
SET tags = run.tags || ARRAY(
        SELECT tag FROM unnest($3::text[]) WITH ORDINALITY AS added (tag, position)
        WHERE tag <> ALL (run.tags) ORDER BY position
    ),
    metadata = CASE
        WHEN jsonb_typeof($4::jsonb) <> 'object' THEN run.metadata ELSE coalesce(run.metadata, '{}'::jsonb) || $4::jsonb
    END,
    metadata_version = run.metadata_version + 1,
    revision = run.revision + 1,
    applied = run.applied || $1::text,
    updated_at = now()
WHERE run.id = $2 AND NOT run.applied @> ARRAY[$1::text]
