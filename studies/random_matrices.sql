-- Queries of studies/random_matrices.py. Three tables are not the store's: `plan` has one row per trial of the preset;
-- `chosen` one row per trial with a result; `student` the 97.5 % quantile t95 of Student's t for n readings.

-- name: distribution
-- One row per norm, number of matrices and interval: share of all singular values, over repeats. The interval above the
-- theory's support is left out.
select
    norm,
    depth,
    low,
    high,
    sum(values) / sum(all_values) as share
from spectrum_histogram
join chosen using (trial)
join trials using (trial)
where high < 'infinity'::double
group by norm, depth, low, high
order by norm, depth, low

-- name: condition
-- One row per norm and number of matrices: decimal logarithm of the condition number over repeats.
with
-- one row per norm and number of matrices
over_seeds as (
    select
        norm,
        depth,
        count(*) as n,
        avg(log10_condition) as condition,
        stddev_samp(log10_condition) / sqrt(count(*)) as error
    from spectrum
    join chosen using (trial)
    join trials using (trial)
    group by norm, depth
)

select
    norm,
    depth,
    n,
    condition,
    condition - t95 * error as low,
    condition + t95 * error as high
from over_seeds
left join student using (n)
order by norm, depth

-- name: largest
-- One row per number of matrices of the paper's size without norms: largest singular value over sqrt(N)^M, over repeats.
with
-- one row per number of matrices
over_seeds as (
    select depth, avg(largest) as measured, count(*) as n, stddev_samp(largest) / sqrt(count(*)) as error
    from spectrum
    join chosen using (trial)
    join trials using (trial)
    where width = 1000 and norm = 'none'
    group by depth
)

select depth, measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)
order by depth

-- name: near_zero
-- One row per number of matrices without norms: share of the singular values in the first fiftieth of the theory's support.
with
-- one row per number of matrices and repeat
by_trial as (
    select trial, depth, values / all_values as share
    from spectrum_histogram
    join chosen using (trial)
    join trials using (trial)
    where norm = 'none' and low = 0
),

-- one row per number of matrices
over_seeds as (
    select depth, avg(share) as measured, count(*) as n, stddev_samp(share) / sqrt(count(*)) as error
    from by_trial
    group by depth
)

select depth, measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)
order by depth

-- name: least_growth
-- One row: from M to M + 1 matrices without norms, by how many decades the condition number grows where it grows least.
with
-- one row per number of matrices
ladder as (
    select depth, avg(log10_condition) as condition, count(*) as n
    from spectrum
    join chosen using (trial)
    join trials using (trial)
    where norm = 'none'
    group by depth
),

-- one row per step of the ladder
steps as (
    select condition - lag(condition) over (order by depth) as growth, least(n, lag(n) over (order by depth)) as n
    from ladder
)

select min(growth) as measured, min(n) as n
from steps
where growth is not null

-- name: growth_of_scale_with_norms
-- One row: by how many decades a factor the largest singular value itself grows from 2 to 5 matrices with batch norms.
with
-- one row per number of matrices
ladder as (
    select depth, avg(log10(largest * scale)) as size, count(*) as n
    from spectrum
    join chosen using (trial)
    join trials using (trial)
    where norm = 'batch'
    group by depth
)

select (arg_max(size, depth) - arg_min(size, depth)) / nullif(max(depth) - min(depth), 0) as measured, min(n) as n
from ladder
having count(*) > 1
