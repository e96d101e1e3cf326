-- Nobody waits any longer for runs that have ended.
-- $1 run ids, text[]
UPDATE mollifier.waitpoints SET status = 'COMPLETED'
WHERE child_run_id = ANY ($1::text[]) AND status = 'PENDING'
