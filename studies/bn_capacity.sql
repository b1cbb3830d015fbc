-- Queries of studies/bn_capacity.py. Three tables are not the store's: `plan` has one row per trial of the preset;
-- `chosen` one row per trial with a result whose learning rate was chosen on held-out training images, with its test
-- accuracy at the end (null where it diverged); `student` the 97.5 % quantile t95 of Student's t for n readings.
-- The gap is training accuracy less test accuracy of one network at one step, in evaluation mode, on images that no
-- augmentation touched. Accuracy on training images counts the labels trained on.

-- name: planned
-- One row per trial of the preset, run or not: its augmentation, where that is an axis, and as `others` the axes that
-- this study does not name.
select
    trial,
    regexp_extract(cell, '(^| )augmentation=(\S+)', 2) as augmented,
    regexp_extract(cell, '(^| )label_noise=(\S+)', 2) in ('', '0.0') as true_labels,
    trim(regexp_replace(
        cell,
        '(^| )(data|depth|trainable|augmentation|label_noise|norm_init|affine|affine_at|gamma_l1|gamma_l2|beta_l1|beta_l2)=\S+',
        '',
        'g'
    )) as others
from plan

-- name: compared_augmentation
-- One row: the augmentation under which networks on true labels are compared, of the plan and not of what has been run
-- so far: the one with most trials.
with
-- one row per augmentation
sizes as (
    select augmented, count(*) as trials
    from planned
    where true_labels
    group by augmented
)

select first(augmented order by trials desc, augmented) as augmented
from sizes

-- name: described
-- One row per trial with a result. `kind` is what trains: `bn` stands for gamma, beta or both. `change` is what its
-- batch norm has that the report's does not, `plain` where that is nothing. Where an axis that this study does not name
-- has several values, `change` names its value, so that settings are never taken for seeds, and none of them is plain.
-- `penalty` and `strength` name a penalty on gamma or beta where that is the only change.
with
-- one row per trial
named as (
    select
        trial,
        augmented,
        if(trainable in ('bn', 'gamma', 'beta'), 'bn', trainable) as kind,
        concat_ws(
            ', ',
            if(norm_init != 'uniform' and not (affine = 'beta' and norm_init = 'ones'), 'start ' || norm_init, null),
            case affine when 'gamma' then 'no beta' when 'beta' then 'no gamma' end,
            if(affine_at != 'every', 'affine at ' || affine_at, null),
            if(trainable in ('gamma', 'beta'), 'only ' || trainable || ' trains', null),
            nullif(if((select count(distinct others) from planned) > 1, others, ''), '')
        ) as other_change,
        concat_ws(
            ', ',
            if(gamma_l1 > 0, 'gamma_l1', null),
            if(gamma_l2 > 0, 'gamma_l2', null),
            if(beta_l1 > 0, 'beta_l1', null),
            if(beta_l2 > 0, 'beta_l2', null)
        ) as penalties,
        gamma_l1 + gamma_l2 + beta_l1 + beta_l2 as strength
    from planned
    join trials using (trial)
    where outcome in ('finished', 'diverged')
)

select
    trial,
    augmented,
    kind,
    case
        when penalties = '' and other_change = '' then 'plain'
        else concat_ws(', ', nullif(other_change, ''), if(penalties = '', null, penalties || format(' {:g}', strength)))
    end as change,
    if(other_change = '' and penalties in ('gamma_l1', 'gamma_l2', 'beta_l1', 'beta_l2'), penalties, null) as penalty,
    if(other_change = '', strength, null) as strength
from named

-- name: ends
-- One row per trial that finished: accuracies at its last step, and the gap between two of them.
with
-- one row per trial: all of them of the network after its last update
last as (
    select
        trial,
        max(accuracy) filter (where split = 'train') as train,
        max(accuracy) filter (where split = 'test') as test,
        max(accuracy) filter (where split = 'validation') as held_out,
        max(images) filter (where split = 'train') as train_images,
        max(images) filter (where split = 'test') as test_images
    from curve
    join trials using (trial)
    where
        outcome = 'finished'
        and curve.step = trials.step
        and isfinite(accuracy)
    group by trial
    having train is not null and test is not null
)

select
    trial,
    data,
    data_title,
    depth,
    kind,
    change,
    penalty,
    strength,
    augmented,
    label_noise,
    lr,
    seed,
    trainable_parameters as parameters,
    train,
    test,
    held_out,
    train - test as gap,
    train_images,
    test_images,
    case data when 'digits' then 1437 when 'cifar10' then 50000 when 'cifar100' then 50000 else 60000 end
    - validation as images,
    if(data = 'cifar100', 100, 10) as classes
from last
join described using (trial)
join trials using (trial)

-- name: compared
-- One row per trial on true labels that finished, at the learning rate chosen on held-out images.
select *
from ends
where
    trial in (select trial from chosen)
    and label_noise = 0
    and augmented = (select augmented from compared_augmentation)

-- name: gap_by_depth
-- One row per data set, depth and what trains: the plain networks' accuracies and gap, with its 95 % interval over
-- seeds; `points`, `low` and `high` in percentage points. `image_error` is what so few images leave uncertain of the gap,
-- one standard error: all seeds share the images.
with
-- one row per data set, depth and what trains
over_seeds as (
    select
        data_title,
        depth,
        kind,
        count(*) as n,
        avg(train) as train,
        avg(test) as test,
        avg(gap) as gap,
        stddev_samp(gap) / sqrt(count(*)) as error,
        any_value(train_images) as train_images,
        any_value(test_images) as test_images
    from compared
    where change = 'plain'
    group by data_title, depth, kind
)

select
    data_title,
    depth,
    kind,
    n,
    train,
    test,
    gap,
    error,
    100 * gap as points,
    100 * (gap - t95 * error) as low,
    100 * (gap + t95 * error) as high,
    sqrt(train * (1 - train) / train_images + test * (1 - test) / test_images) as image_error
from over_seeds
left join student using (n)
order by data_title, depth, kind

-- name: over_training
-- One row per data set, depth, what trains, part of the data and share of training: accuracy of the plain networks over
-- seeds with its 95 % interval. `line` names what trains and the part, `panel` data and depth.
with
-- one row per data set, depth, line and reading
over_seeds as (
    select
        compared.data_title,
        compared.depth,
        kind || ' ' || split as line,
        curve.step / total_steps as share,
        count(*) as n,
        avg(accuracy) as accuracy,
        stddev_samp(accuracy) / sqrt(count(*)) as error
    from compared
    join curve using (trial)
    join trials using (trial)
    where
        change = 'plain'
        and split in ('train', 'test')
        and isfinite(accuracy)
    group by all
)

select
    data_title || format(', {} layers', depth) as panel,
    line,
    share,
    n,
    accuracy,
    accuracy - t95 * error as low,
    accuracy + t95 * error as high
from over_seeds
left join student using (n)
order by data_title, depth, line, share

-- name: changes_by_seed
-- One row per data set, change of batch norm and seed, the plain network among them: BN-only accuracies and gap, and
-- these less those of the plain network of the same seed, means over the depths at which batch norm is changed.
select
    changed.data_title,
    changed.change,
    any_value(changed.penalty) as penalty,
    any_value(changed.strength) as strength,
    changed.seed,
    count(*) as depths,
    avg(changed.train) as train,
    avg(changed.test) as test,
    avg(changed.held_out) as held_out,
    avg(changed.gap) as gap,
    avg(changed.test - plain.test) as test_gain,
    avg(changed.gap - plain.gap) as gap_gain
from compared as changed
join compared as plain using (data_title, depth, seed)
where
    changed.kind = 'bn'
    and plain.kind = 'bn'
    and plain.change = 'plain'
    and (changed.data_title, changed.depth) in (
        select (data_title, depth) from compared where kind = 'bn' and change != 'plain'
    )
group by changed.data_title, changed.change, changed.seed

-- name: changes
-- One row per data set and change of batch norm: BN-only accuracies and gap over seeds, and what the change makes of
-- the plain network's, with 95 % intervals.
with
-- one row per data set and change
over_seeds as (
    select
        data_title,
        change,
        any_value(penalty) as penalty,
        any_value(strength) as strength,
        count(*) as n,
        avg(train) as train,
        avg(test) as test,
        avg(held_out) as held_out,
        avg(gap) as gap,
        stddev_samp(gap) / sqrt(count(*)) as gap_error,
        avg(gap_gain) as gap_gain,
        stddev_samp(gap_gain) / sqrt(count(*)) as gap_gain_error,
        avg(test_gain) as test_gain,
        stddev_samp(test_gain) / sqrt(count(*)) as test_gain_error
    from changes_by_seed
    group by data_title, change
)

select
    data_title,
    change,
    penalty,
    strength,
    n,
    train,
    test,
    held_out,
    gap,
    gap - t95 * gap_error as gap_low,
    gap + t95 * gap_error as gap_high,
    gap_gain,
    gap_gain - t95 * gap_gain_error as gap_gain_low,
    gap_gain + t95 * gap_gain_error as gap_gain_high,
    test_gain,
    test_gain - t95 * test_gain_error as test_gain_low,
    test_gain + t95 * test_gain_error as test_gain_high
from over_seeds
left join student using (n)
order by data_title, change != 'plain', penalty is null, penalty, strength, change

-- name: gap_by_change
-- One row per data set and change of batch norm: the gap of BN only, means over depths, in percentage points.
select data_title, change, n, 100 * gap as points, 100 * gap_low as low, 100 * gap_high as high
from changes

-- name: test_by_change
-- One row per data set and change of batch norm, the plain one left out: what it adds to BN-only test accuracy, in
-- percentage points.
select data_title, change, n, 100 * test_gain as points, 100 * test_gain_low as low, 100 * test_gain_high as high
from changes
where change != 'plain'

-- name: memorised
-- One row per trial for random labels that finished: how many of its training labels it has right beyond what it would
-- of as many images that it never saw, with labels as noisy. Of those, one in `classes` of the labels drawn anew is
-- right by chance, and of the others as many as of the test images. On labels that are all random it is accuracy above
-- chance times training images; on true labels it is the gap times these. There is no choice of a rate: true labels are
-- shown at the one that random labels are learned at, and where these have several, none is shown.
with
-- one row: what networks on noisy labels are trained with
protocol as (
    select any_value(augmented) as augmented, any_value(lr) as lr
    from ends
    where label_noise > 0
    having count(distinct lr) = 1 and count(distinct augmented) = 1
)

select
    ends.*,
    train - (label_noise / classes + (1 - label_noise) * test) as beyond,
    images * (train - (label_noise / classes + (1 - label_noise) * test)) as labels
from ends
join protocol using (augmented, lr)
where change = 'plain'

-- name: memorised_by_depth
-- One row per data set, depth, what trains and share of random labels: labels memorised, over seeds with its 95 %
-- interval. `beyond` is their share of the training images, `per_parameter` their number by that of what trains.
with
-- one row per data set, depth, what trains and share of random labels
over_seeds as (
    select
        data,
        data_title,
        depth,
        kind,
        label_noise,
        any_value(parameters) as parameters,
        any_value(images) as images,
        count(*) as n,
        avg(train) as train,
        avg(test) as test,
        avg(beyond) as beyond,
        stddev_samp(beyond) / sqrt(count(*)) as error,
        (max(beyond) - min(beyond)) / 2 as spread
    from memorised
    group by data, data_title, depth, kind, label_noise
)

select
    data,
    data_title,
    depth,
    kind,
    label_noise,
    kind || format(' {:g}', label_noise) as line,
    n,
    parameters,
    images,
    train,
    test,
    beyond,
    beyond - t95 * error as beyond_low,
    beyond + t95 * error as beyond_high,
    spread,
    images * beyond as labels,
    images * (beyond - t95 * error) as low,
    images * (beyond + t95 * error) as high,
    images * beyond / parameters as per_parameter
from over_seeds
left join student using (n)
order by data_title, depth, kind, label_noise

-- name: memorised_by_parameters
-- One row per data set, what trains, share of random labels and number of parameters that train: labels memorised.
select data_title, line, parameters, depth, n, labels, low, high, per_parameter
from memorised_by_depth
where parameters is not null and label_noise > 0
order by data_title, line, parameters

-- name: random_labels
-- One row per data set and what trains, at the greatest depth: the networks on labels that are all random.
select *
from memorised_by_depth
where label_noise = 1
qualify row_number() over (partition by data_title, kind order by depth desc) = 1

-- name: overfits
-- One row: the gap of BN only at the greatest depth by its standard error, of images and seeds, on the data set where
-- that is least.
with
-- one row per data set
deepest as (
    select *, sqrt(image_error * image_error + coalesce(error * error, 0)) as uncertain
    from gap_by_depth
    where kind = 'bn'
    qualify row_number() over (partition by data_title order by depth desc) = 1
)

select gap / uncertain as measured, n, data_title, gap, uncertain
from deepest
where uncertain > 0
qualify row_number() over (order by measured) = 1

-- name: whole_overfits_more
-- One row: the gap of the network trained whole less that of BN only, where that is least over data sets and depths.
with
-- one row per data set and depth
differences as (
    select
        max(gap) filter (where kind = 'all') - max(gap) filter (where kind = 'bn') as difference,
        least(
            coalesce(max(n) filter (where kind = 'all'), 0),
            coalesce(max(n) filter (where kind = 'bn'), 0)
        ) as n
    from gap_by_depth
    group by data_title, depth
)

select min(difference) as measured, min(n) as n
from differences -- a depth at which one side has no number counts with n = 0

-- name: gains_over_the_ladder
-- One row per quantity of BN only, its gap and its test accuracy: at the greatest depth less at the least, with a 95 %
-- interval, on the data set where that is least.
with
-- one row per data set, depth and quantity
ladder as (
    unpivot (
        select data_title, depth, gap, test
        from compared
        where kind = 'bn' and change = 'plain'
    )
    on gap, test
    into name quantity value reading
),

-- one row per data set, quantity and depth
means as (
    select data_title, quantity, depth, avg(reading) as mean, var_samp(reading) / count(*) as squared_error, count(*) as n
    from ladder
    group by data_title, quantity, depth
),

-- one row per data set and quantity
ends_of_it as (
    select
        data_title,
        quantity,
        arg_max(mean, depth) - arg_min(mean, depth) as gain,
        sqrt(arg_max(squared_error, depth) + arg_min(squared_error, depth)) as error,
        least(arg_max(n, depth), arg_min(n, depth)) as n
    from means
    group by data_title, quantity
    having count(*) > 1
)

select quantity, gain as measured, n, gain - t95 * error as low, gain + t95 * error as high, data_title
from ends_of_it
left join student using (n)
qualify row_number() over (partition by quantity order by gain) = 1

-- name: penalties
-- One row per penalty on gamma or beta: what it adds to the gap of BN only, at the strength that is best on held-out
-- images, on the data set where that is most. Without held-out images there is a row only where there is one strength.
with
-- one row per data set and penalty
picked as (
    select *
    from changes
    where penalty is not null
    qualify
        row_number() over (partition by data_title, penalty order by held_out desc nulls last, strength) = 1
        and (held_out is not null or count(*) over (partition by data_title, penalty) = 1)
)

select
    penalty,
    gap_gain as measured,
    n,
    gap_gain_low as low,
    gap_gain_high as high,
    strength,
    test_gain,
    data_title
from picked
qualify row_number() over (partition by penalty order by gap_gain desc) = 1

-- name: best_change
-- One row: what the change of batch norm that is best on held-out images adds to BN-only test accuracy, on the data set
-- where that is least.
with
-- one row per data set
picked as (
    select *
    from changes
    where change != 'plain' and held_out is not null
    qualify row_number() over (partition by data_title order by held_out desc, change) = 1
)

select test_gain as measured, n, test_gain_low as low, test_gain_high as high, change, gap_gain, data_title
from picked
qualify row_number() over (order by test_gain) = 1

-- name: gamma_over_beta
-- One row: test accuracy with gamma alone trained less that with beta alone trained, seed by seed and as a mean over
-- depths, on the data set where that is least.
with
-- one row per data set
leads as (
    select
        data_title,
        count(*) as n,
        avg(gamma.test - beta.test) as lead,
        stddev_samp(gamma.test - beta.test) / sqrt(count(*)) as error
    from changes_by_seed as gamma
    join changes_by_seed as beta using (data_title, seed, depths)
    where gamma.change = 'only gamma trains' and beta.change = 'only beta trains'
    group by data_title
)

select lead as measured, n, lead - t95 * error as low, lead + t95 * error as high, data_title
from leads
left join student using (n)
qualify row_number() over (order by lead) = 1

-- name: memorises
-- One row per what trains: the share of random labels that the deepest network has right beyond chance, on the data set
-- where that is least.
select kind, beyond as measured, n, beyond_low as low, beyond_high as high, labels, per_parameter, data_title
from random_labels
qualify row_number() over (partition by kind order by beyond) = 1

-- name: memorised_steps_that_fall
-- One row: at how many steps of the depth ladder the number of random labels that BN only memorises falls by more than
-- the seeds spread, half their range at either depth, added up. Over all data sets.
with
-- one row per data set and step from a depth to the next
steps as (
    select
        beyond - lag(beyond) over ladder as gain,
        spread + lag(spread) over ladder as spread,
        least(n, lag(n) over ladder) as n,
        lag(depth) over ladder as before
    from memorised_by_depth
    where kind = 'bn' and label_noise = 1
    window ladder as (partition by data_title order by depth)
)

select count(*) filter (where gain < -spread) as measured, min(n) as n
from steps
where before is not null
having count(*) > 0

-- name: memorised_gain
-- One row: the share of random labels that BN only memorises at the greatest depth less at the least, on the data set
-- where that is least.
with
-- one row per data set
ladder as (
    select
        data_title,
        arg_max(beyond, depth) - arg_min(beyond, depth) as gain,
        arg_max(labels, depth) / arg_min(labels, depth) as factor,
        min(n) as n
    from memorised_by_depth
    where kind = 'bn' and label_noise = 1
    group by data_title
    having count(*) > 1
)

select gain as measured, n, factor, data_title
from ladder
qualify row_number() over (order by gain) = 1

-- name: whole_memorises_more
-- One row: the share of random labels that the network trained whole memorises less that of BN only, where that is
-- least over data sets and depths.
with
-- one row per data set and depth
differences as (
    select
        max(beyond) filter (where kind = 'all') - max(beyond) filter (where kind = 'bn') as difference,
        least(
            coalesce(max(n) filter (where kind = 'all'), 0),
            coalesce(max(n) filter (where kind = 'bn'), 0)
        ) as n
    from memorised_by_depth
    where label_noise = 1
    group by data_title, depth
)

select min(difference) as measured, min(n) as n
from differences -- a depth at which one side has no number counts with n = 0

-- name: fitted_on_cifar10
-- One row: accuracy of the deepest network trained whole on random labels of CIFAR-10, as many epochs as the report's.
select train as measured, n, depth
from random_labels
where
    data = 'cifar10'
    and kind = 'all'
    and (select min(epochs) from memorised join trials using (trial) where trials.label_noise = 1) >= 160
