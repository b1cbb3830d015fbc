-- Queries of studies/frankle_depth.py. Three tables are not the store's: `plan` has one row per trial of the preset;
-- `chosen` one row per trial with a result whose learning rate was chosen on held-out training images, with its
-- test accuracy at the end (null where it diverged); `student` the 97.5 % quantile t95 of Student's t for n readings.
-- All of them speak of the paper's networks: CIFAR ResNets with batch normalization after every convolution.

-- name: accuracy_over_depth
-- One row per trained set and depth at width 1: test accuracy over seeds with its 95 % interval.
with
-- one row per trained set and depth
over_seeds as (
    select
        trainable,
        depth,
        count(accuracy) as n,
        avg(accuracy) as accuracy,
        stddev_samp(accuracy) / sqrt(count(accuracy)) as error,
        count(*) filter (where outcome = 'diverged') / count(*) as diverged
    from chosen
    join trials using (trial)
    where
        width = 1
        and (network, norm, placement) = ('resnet', 'batch', 'every')
    group by trainable, depth
)

select
    trainable,
    depth,
    n,
    accuracy,
    accuracy - t95 * error as low,
    accuracy + t95 * error as high,
    diverged
from over_seeds
left join student using (n)
order by trainable, depth

-- name: accuracy_over_width
-- One row per trained set and width at 14 layers: test accuracy over seeds with its 95 % interval.
with
-- one row per trained set and width, where the preset has a ladder of widths
over_seeds as (
    select
        trainable,
        width,
        count(accuracy) as n,
        avg(accuracy) as accuracy,
        stddev_samp(accuracy) / sqrt(count(accuracy)) as error,
        count(*) filter (where outcome = 'diverged') / count(*) as diverged
    from chosen
    join trials using (trial)
    where
        depth = 14
        and (network, norm, placement) = ('resnet', 'batch', 'every')
        and (select count(distinct width) from plan join trials using (trial)) > 1
    group by trainable, width
)

select
    trainable,
    width,
    n,
    accuracy,
    accuracy - t95 * error as low,
    accuracy + t95 * error as high,
    diverged
from over_seeds
left join student using (n)
order by trainable, width

-- name: gamma_distribution
-- One row per trained set, depth and interval of |gamma| at the end of training, for sets that train gamma.
select
    trainable,
    depth,
    low,
    high,
    avg(channels / all_channels) as share
from gamma_histogram
join chosen using (trial)
join trials using (trial)
where
    width = 1
    and (network, norm, placement) = ('resnet', 'batch', 'every')
    and gamma_histogram.step = trials.step
    and isfinite(high)
    and trainable in ('all', 'bn', 'bn_output', 'bn_shortcut_output')
group by trainable, depth, low, high
order by trainable, depth, low

-- name: gamma_by_layer
-- One row per trained set, depth and norm layer at the end: quantiles of |gamma| over channels, mean over seeds.
select
    trainable,
    depth,
    layer_index,
    avg(gamma_q05) as q05,
    avg(gamma_q25) as q25,
    avg(gamma_q50) as q50,
    avg(gamma_q75) as q75,
    avg(gamma_q95) as q95
from gamma
join chosen using (trial)
join trials using (trial)
where
    width = 1
    and (network, norm, placement) = ('resnet', 'batch', 'every')
    and gamma.step = trials.step
    and trainable in ('all', 'bn')
group by trainable, depth, layer_index
order by trainable, depth, layer_index

-- name: dead_by_depth
-- One row per trained set and depth: share of all gammas with |gamma| < 0.01 after training, over seeds.
with
-- one row per trial
by_trial as (
    select trial, sum(gamma_dead * channels) / sum(channels) as dead
    from gamma
    join trials using (trial)
    where gamma.step = trials.step
    group by trial
),

-- one row per trained set and depth
over_seeds as (
    select
        trainable,
        depth,
        count(*) as n,
        avg(dead) as dead,
        stddev_samp(dead) / sqrt(count(*)) as error
    from by_trial
    join chosen using (trial)
    join trials using (trial)
    where
        width = 1
        and (network, norm, placement) = ('resnet', 'batch', 'every')
        and trainable in ('all', 'bn', 'bn_output', 'bn_shortcut_output')
    group by trainable, depth
)

select
    trainable,
    depth,
    n,
    dead,
    greatest(dead - t95 * error, 0) as low,
    dead + t95 * error as high
from over_seeds
left join student using (n)
order by trainable, depth

-- name: sparsity_by_layer
-- One row per trained set and ReLU of the deepest network: share of outputs that are zero after training.
with
-- one row per trained set, ReLU and seed
deepest as (
    select trainable, layer_index, zero
    from sparsity
    join chosen using (trial)
    join trials using (trial)
    where
        width = 1
        and (network, norm, placement) = ('resnet', 'batch', 'every')
        and sparsity.step = trials.step
        and depth = (
            select max(depth) from chosen join trials using (trial)
            where width = 1 and (network, norm, placement) = ('resnet', 'batch', 'every')
        )
)

select
    trainable,
    layer_index,
    avg(zero) as zero,
    min(zero) as low,
    max(zero) as high
from deepest
group by trainable, layer_index
order by trainable, layer_index

-- name: steps_that_fall
-- One row: at how many steps of the BN-only depth ladder the mean falls by more than the seeds spread.
with
-- one row per depth
ladder as (
    select
        depth,
        avg(accuracy) as mean,
        (max(accuracy) - min(accuracy)) / 2 as spread,
        count(accuracy) as n
    from chosen
    join trials using (trial)
    where
        width = 1
        and (network, norm, placement) = ('resnet', 'batch', 'every')
        and trainable = 'bn'
    group by depth
),

-- one row per step from a depth to the next
steps as (
    select
        mean - lag(mean) over (order by depth) as gain,
        spread + lag(spread) over (order by depth) as spread,
        least(n, lag(n) over (order by depth)) as n,
        lag(depth) over (order by depth) as before
    from ladder
)

select
    count(*) filter (where gain < -spread) as measured,
    min(n) as n
from steps
where before is not null
having count(*) > 0

-- name: gain_over_the_ladder
-- One row: BN-only test accuracy at the greatest depth less that at the least, with a 95 % interval: both errors,
-- and Student's t of the smaller number of seeds, which is wider than Welch's.
with
-- one row per depth
ladder as (
    select
        depth,
        avg(accuracy) as mean,
        var_samp(accuracy) / count(accuracy) as squared_error,
        count(accuracy) as n
    from chosen
    join trials using (trial)
    where
        width = 1
        and (network, norm, placement) = ('resnet', 'batch', 'every')
        and trainable = 'bn'
    group by depth
),

-- one row
ends as (
    select
        arg_max(mean, depth) - arg_min(mean, depth) as gain,
        sqrt(arg_max(squared_error, depth) + arg_min(squared_error, depth)) as error,
        least(arg_max(n, depth), arg_min(n, depth)) as n
    from ladder
    having count(*) > 1
)

select
    gain as measured,
    n,
    gain - t95 * error as low,
    gain + t95 * error as high
from ends
left join student using (n)

-- name: lead_over_random_weights
-- One row: the least lead, over depths, of BN only over two random weights a channel.
with
-- one row per depth
leads as (
    select
        depth,
        avg(accuracy) filter (where trainable = 'bn') - avg(accuracy) filter (where trainable = 'two_per_channel') as lead,
        least(
            count(accuracy) filter (where trainable = 'bn'),
            count(accuracy) filter (where trainable = 'two_per_channel')
        ) as n
    from chosen
    join trials using (trial)
    where
        width = 1
        and (network, norm, placement) = ('resnet', 'batch', 'every')
    group by depth
)

select
    min(lead) as measured,
    min(n) as n
from leads -- a depth at which one side has no number counts with n = 0

-- name: lead_of_all
-- One row: the least lead, over depths, of training every parameter over BN only.
with
-- one row per depth
leads as (
    select
        depth,
        avg(accuracy) filter (where trainable = 'all') - avg(accuracy) filter (where trainable = 'bn') as lead,
        least(
            count(accuracy) filter (where trainable = 'all'),
            count(accuracy) filter (where trainable = 'bn')
        ) as n
    from chosen
    join trials using (trial)
    where
        width = 1
        and (network, norm, placement) = ('resnet', 'batch', 'every')
    group by depth
)

select
    min(lead) as measured,
    min(n) as n
from leads -- a depth at which one side has no number counts with n = 0

-- name: accuracy_on_cifar10
-- One row per trained set and depth: test accuracy on CIFAR-10, trained for the paper's 160 epochs, over seeds.
with
-- one row per trained set and depth
over_seeds as (
    select
        trainable,
        depth,
        avg(accuracy) as measured,
        count(accuracy) as n,
        stddev_samp(accuracy) / sqrt(count(accuracy)) as error
    from chosen
    join trials using (trial)
    where
        width = 1
        and (network, norm, placement) = ('resnet', 'batch', 'every')
        and data = 'cifar10'
        and label_noise = 0
        and epochs >= 160
        and batch = 128
        and norm_init = 'uniform'
    group by trainable, depth
)

select trainable, depth, measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)
order by trainable, depth

-- name: dead_gammas
-- One row: share of gammas with |gamma| < 0.01 after the paper's 160 epochs of BN-only training on CIFAR-10, at the
-- deepest network of 110 layers or more.
with
-- one row per trial
by_trial as (
    select
        trial,
        any_value(depth) as depth,
        sum(gamma_dead * channels) / sum(channels) as dead
    from gamma
    join chosen using (trial)
    join trials using (trial)
    where
        gamma.step = trials.step
        and data = 'cifar10'
        and label_noise = 0
        and epochs >= 160
        and trainable = 'bn'
        and width = 1
        and (network, norm, placement) = ('resnet', 'batch', 'every')
        and depth >= 110
    group by trial
),

-- one row
over_seeds as (
    select avg(dead) as measured, count(*) as n, stddev_samp(dead) / sqrt(count(*)) as error
    from by_trial
    where depth = (select max(depth) from by_trial)
)

select measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)

-- name: clamping
-- One row: the largest change, over depths at which that is 5 % of the gammas or more, of BN-only test accuracy when
-- every |gamma| < 0.01 is set to 0.
with
-- one row per depth
changes as (
    select
        depth,
        avg(abs(clamp.accuracy_clamped - clamp.accuracy)) as change,
        avg(clamped) as clamped,
        count(*) as n
    from clamp
    join chosen using (trial)
    join trials using (trial)
    where
        width = 1
        and (network, norm, placement) = ('resnet', 'batch', 'every')
        and split = 'test'
        and clamp.step = trials.step
        and trainable = 'bn'
    group by depth
)

select max(change) as measured, min(n) as n
from changes
where clamped >= 0.05
