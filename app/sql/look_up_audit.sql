-- The newest changes that operators made, the newest first.
-- $1 what was changed, text, or null for anything  $2 how many, integer
-- Returns at, who, database_user, what, before and after as JSON text, whether this transaction made it
SELECT at, who, database_user, what, before::text, after::text, xmin = pg_current_xact_id()::xid AS is_new
FROM mollifier.audit
WHERE $1::text IS NULL OR what = $1
ORDER BY id DESC
LIMIT $2
